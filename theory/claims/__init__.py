"""One file a paper; each file's claims carry their controls."""
