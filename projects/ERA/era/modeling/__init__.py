"""Students, teachers and the step that both make."""
