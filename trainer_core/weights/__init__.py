"""Weight files as people have them: what lies in a file, read tensor by tensor. Knows layouts, not networks."""
