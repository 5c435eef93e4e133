"""The certificate: layouts compared with one plain process, and faults that must be seen."""
