"""A plan or a bundle as one page to read and to pass on, with what a search found beside it."""
