"""The Alembic environment that all services share; a service brings only `migrations/versions/`."""
