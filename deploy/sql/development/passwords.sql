-- For development only, before roles.sql has run: the roles of the binaries, with a password that everybody knows.
-- roles.sql finds them and gives them their rights. In production each role has a password of its own.

CREATE ROLE bus_publisher LOGIN PASSWORD 'development';
CREATE ROLE bus_worker LOGIN PASSWORD 'development';
CREATE ROLE bus_scheduler LOGIN PASSWORD 'development';
CREATE ROLE bus_archiver LOGIN PASSWORD 'development';
CREATE ROLE bus_all LOGIN PASSWORD 'development';
