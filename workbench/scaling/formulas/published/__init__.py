"""The laws that ship, by what they depend on; importing a module registers its laws on `lawbook.LAW`."""
