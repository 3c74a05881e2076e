"""The version, by semantic versioning (CHANGELOG.md says what that covers)."""

__version__ = "0.1.0"
