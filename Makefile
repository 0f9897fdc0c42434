.PHONY: quality style test test-slow

# What continuous integration asks of every file.
quality:
	ruff check .
	ruff format --check .

# Fix what can be fixed.
style:
	ruff check --fix .
	ruff format .

test:
	pytest

# Only the tests that `make test` leaves out.
test-slow:
	pytest -m slow
