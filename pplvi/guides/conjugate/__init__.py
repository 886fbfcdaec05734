"""Coordinate ascent on unchanged programs: latent sites as symbols, expectations of log densities as einsums.

To read it: a program is run once with symbols (``program``), which torch's functions make polynomials of
(``expressions``, ``terms``, ``operations``, ``arrangements``). A table of distributions (``tables``) asks for
expectations of these (``expectations``), or integrates (``quadrature``, ``rows``, ``hermite``); what comes of it is a
``reading``. Turns of a loop are one factor (``loops``, ``merging``), enumerated chains go by scans (``chains``). Blocks
of sites have a family (``families``, ``normal``, ``lognormal``, ``joint``), whose next natural parameters are gradients
of the expected log joint (``ascent``, ``fallbacks``, ``rates``), or a factor of another guide family, known by draws
(``trained``, ``sampled``). ``auto`` is the guide, which draws from blocks (``draws``, ``enumerated``, ``complete``,
``quantiles``) by what it keeps of the program (``shapes``, ``keeping``).
"""
