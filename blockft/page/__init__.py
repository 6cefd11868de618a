"""The page of `blockft inspect --html`: statistics and samples of a prepared folder in one HTML file."""
