"""Results for a reader and for a script: columns, tables, files, option types."""
