"""Who may do what: API keys, logins, their limits, and the audit log. Imports no web framework."""
