"""The records: SQLModel tables, transactions, migrations."""
