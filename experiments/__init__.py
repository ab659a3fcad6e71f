"""What people run: the `fedwsa` command, its configs, tables, figures and reports."""
