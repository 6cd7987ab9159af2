"""A store of versions: a folder or an object store that trainers write and engines follow, with no other link."""
