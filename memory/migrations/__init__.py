"""Alembic migrations of the store's schema; run by `persona_sdk.memory.database`."""
