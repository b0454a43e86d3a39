"""Pictures and measurements shown to users: contact sheets, validation grids, loss charts and drift."""
