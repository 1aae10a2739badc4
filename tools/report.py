#!/usr/bin/env python3
"""Write one self-contained HTML file about one or several runs."""

from era.launch import run_main
from era.report.cli import report_main

if __name__ == "__main__":
    run_main(report_main)
