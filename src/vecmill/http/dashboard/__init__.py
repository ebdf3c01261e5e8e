"""The dashboard: one page that shows a person what the service is doing now."""
