"""Small trained models, their data and seeded full-size shapes; nothing here runs on a server."""
