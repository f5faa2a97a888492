"""`bitquest demo`: real text, three small models, packed, verified and shown. Start with stages.py."""
