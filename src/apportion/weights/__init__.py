"""The weights room: which weights of a layer are kept, and what keeping few is worth in bytes and time."""
