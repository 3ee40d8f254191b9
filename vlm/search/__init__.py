"""Search of picture folders: an index that is kept up to date, exact scores, a graph beyond a million vectors."""
