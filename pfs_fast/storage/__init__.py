"""Files: models, structures and exports, whole or absent, without pickle."""
