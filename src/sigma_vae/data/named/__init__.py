"""Published data sets, each registered under its name."""
