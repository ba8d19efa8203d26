"""Small helpers, under the names that scripts for PAI's SDK import."""
