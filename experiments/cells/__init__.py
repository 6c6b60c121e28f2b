"""Functions that compute experiments' cells and artefacts: pure, JSON in, JSON out."""
