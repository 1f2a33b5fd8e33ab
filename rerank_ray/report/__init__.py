"""Results for people: tables, charts, one self-contained HTML page."""
