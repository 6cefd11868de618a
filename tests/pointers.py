"""Contents that stand in place of a file: a Git LFS pointer and a web page."""

LFS_POINTER = (
    b"version https://git-lfs.github.com/spec/v1\n"
    b"oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\n"
    b"size 12345\n"
)
WEB_PAGE = b"<!DOCTYPE html>\n<html><head><title>Sign in</title></head></html>\n"
