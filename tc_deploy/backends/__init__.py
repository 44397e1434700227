"""One file per engine kind, with the same two verbs: ``build`` a target from a bundle, ``load`` its graphs."""
