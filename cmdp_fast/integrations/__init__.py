"""The operations of this package inside other people's trainers; each module here names the package that it needs."""
