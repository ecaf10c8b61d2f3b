"""Text -> token shards: sources, documents, the build, the shard format, and checks of what was built."""
