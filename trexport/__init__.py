"""trexport: trained adapters to production."""
