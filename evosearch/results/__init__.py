"""What a run found: the front, tables, pictures, reports."""
