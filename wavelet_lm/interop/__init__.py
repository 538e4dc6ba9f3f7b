"""Models of other origins and other libraries."""
