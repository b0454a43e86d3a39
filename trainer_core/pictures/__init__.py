"""Pictures for people: contact sheets, grids, charts, and measures of them."""
