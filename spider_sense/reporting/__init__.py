"""Reports: what a guard is worth and how it reads conversations, as data and as one self-contained HTML page."""

from spider_sense.reporting.assembly import build_report
from spider_sense.reporting.page import render
from spider_sense.reporting.report import Report

__all__ = ["Report", "build_report", "render"]
