"""The files that processes and stores exchange, as types without ML imports: fields, bounds, reading and writing."""
