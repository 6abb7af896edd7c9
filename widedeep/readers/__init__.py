"""What a Reader is made of: rows as matrices (`rows`), and work ahead of the training loop (`prefetch`)."""
