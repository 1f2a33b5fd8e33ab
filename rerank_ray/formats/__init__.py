"""Outside file formats, one a file: readers yield records, writers take them."""
