-- Creates one day's partition of a table whose key is a UUIDv7. A function of the owner, because only the
-- owner may add partitions, and the archiver is not the owner.
CREATE FUNCTION create_day_partition(parent text, day date) RETURNS boolean
    LANGUAGE plpgsql SECURITY DEFINER SET search_path FROM CURRENT
AS $$
DECLARE
    name text := format('%s_%s', parent, to_char(day, 'YYYYMMDD'));
BEGIN
    IF parent NOT IN ('events', 'delivery_attempts') THEN
        RAISE EXCEPTION 'table % is not partitioned by day', parent;
    END IF;
    -- Of several archivers one creates; the others wait here and then see that it exists.
    PERFORM pg_advisory_xact_lock(hashtext(parent));
    IF to_regclass(name) IS NOT NULL THEN
        RETURN false;
    END IF;
    -- Waiting long for the table's lock would hold up every insert behind us; better to try again later.
    PERFORM set_config('lock_timeout', '2s', true);
    EXECUTE format('CREATE TABLE %I PARTITION OF %I FOR VALUES FROM (%L) TO (%L)',
                   name, parent, uuid_floor(day), uuid_floor(day + 1));
    RETURN true;
END
$$;
REVOKE ALL ON FUNCTION create_day_partition(text, date) FROM PUBLIC;

-- The smallest UUIDv7 of a UTC day (RFC 9562 §5.7: 48 bits of milliseconds, version, random bits).
CREATE FUNCTION uuid_floor(day date) RETURNS uuid
    LANGUAGE sql IMMUTABLE
    RETURN (lpad(to_hex((extract(epoch FROM day) * 1000)::bigint), 12, '0') || '70008000000000000000')::uuid;

-- The first days. While the default partition is empty this costs nothing; later every new partition has
-- to look through what lies there, with the table locked. So nothing should ever lie there.
SELECT create_day_partition(parent, (now() AT TIME ZONE 'UTC')::date + ahead)
FROM unnest(ARRAY ['events', 'delivery_attempts']) AS parent, generate_series(0, 7) AS ahead;
