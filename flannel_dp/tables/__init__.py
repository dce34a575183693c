"""The language between Python and the engine: entries, tables, scopes. Pure."""
