"""What the settings of a source say about its records: their columns, and whether they are questions."""

from blockft.config.choices import Format
from blockft.config.settings import Source
from blockft.data.columns import Columns, build_columns
from blockft.data.sources import source_format
from blockft.data.split import SPLIT_FORMATS


def holds_questions(source: Source) -> bool:
    """Return whether the records of a source are questions over documents, worded by `data.prompt`."""
    return source_format(source.format, source_columns(source)).parse_question is not None


def is_split(source: Source) -> bool:
    """Return whether the prompts of a source are chats or instructions, which `data.splitting` splits."""
    return source.format in SPLIT_FORMATS or source.format is Format.columns and not holds_questions(source)


def source_columns(source: Source) -> Columns | None:
    """Return the mapping of the columns of a source as the reader takes it."""
    if source.columns is None:
        return None
    return build_columns(source.columns.model_dump(exclude_none=True))
