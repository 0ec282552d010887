"""What pytest must not import for its doctests: modules whose packages may be missing."""

collect_ignore_glob = ["peers/*_peer.py", "__main__.py"]
