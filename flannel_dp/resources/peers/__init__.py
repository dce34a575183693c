"""The peers' tables: FDB, neighbours, nexthops, routes, or a program's map."""
