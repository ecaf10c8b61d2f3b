"""Text -> token shards: sources, documents, the build, the format, and a look into what was built."""
