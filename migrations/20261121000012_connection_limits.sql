-- How much a connection takes, and how one that fails for long is given up.

ALTER TABLE connections
    -- Requests under way at a time; NULL for what the workers' configuration says.
    ADD COLUMN max_in_flight   integer CHECK (max_in_flight BETWEEN 1 AND 10000),
    -- Requests per second, and how many may follow at once after a pause; NULL for no limit, and for those of one second.
    ADD COLUMN rate_per_second double precision CHECK (rate_per_second BETWEEN 0.001 AND 100000),
    ADD COLUMN burst           integer CHECK (burst BETWEEN 1 AND 100000),
    ADD CONSTRAINT connections_burst CHECK (burst IS NULL OR rate_per_second IS NOT NULL),
    -- Since when a worker has found the endpoint failing, without a success. Not counted in `version`: what is delivered, and
    -- how, does not depend on it.
    ADD COLUMN failing_since   timestamptz;

-- The functions below run as the owner; see 20261121000006.
SELECT set_config('search_path', current_setting('search_path') || ', pg_temp', true);

-- Publishes an event of the bus about a connection, in the organization's own history: it is due now, and the scheduler
-- stores it and fans it out. Its uid is a UUIDv7 of now.
CREATE FUNCTION announce_connection(of_organization uuid, connection uuid, event_type text, about json) RETURNS void
    LANGUAGE plpgsql
AS $$
DECLARE
    millis text := lpad(to_hex(floor(extract(epoch FROM now()) * 1000)::bigint), 12, '0');
    random text := replace(gen_random_uuid()::text, '-', '');
    uid    uuid := (millis || '7' || left(random, 3) || '8' || substr(random, 4, 15))::uuid;
    origin text := '/connections/' || connection;
BEGIN
    INSERT INTO scheduled_events (uid, organization_id, id, source, type, time, due_at, body)
    VALUES (uid, of_organization, uid::text, origin, event_type, now(), now(), convert_to(json_build_object(
        'specversion', '1.0', 'id', uid::text, 'source', origin, 'type', event_type,
        'time', to_char(now() AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"'),
        'datacontenttype', 'application/json', 'data', about)::text, 'UTF8'));
END
$$;
REVOKE ALL ON FUNCTION announce_connection(uuid, uuid, text, json) FROM PUBLIC;

-- As before, with an event that says so.
CREATE OR REPLACE FUNCTION disable_connection(of_organization uuid, connection uuid, attempted_version bigint, why text)
    RETURNS boolean
    LANGUAGE plpgsql SECURITY DEFINER SET search_path FROM CURRENT
AS $$
DECLARE
    millis   text := lpad(to_hex(floor(extract(epoch FROM now()) * 1000)::bigint), 12, '0');
    hash     text := encode(sha256(convert_to(connection || ':' || attempted_version, 'UTF8')), 'hex');
    disabled connections;
BEGIN
    PERFORM 1 FROM organizations WHERE id = of_organization FOR NO KEY UPDATE;
    UPDATE connections
       SET enabled = false, disabled_reason = why, version = version + 1, updated_at = now()
     WHERE id = connection AND organization_id = of_organization AND version = attempted_version
       AND enabled AND deleted_at IS NULL
    RETURNING * INTO disabled;
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    UPDATE organizations SET version = version + 1 WHERE id = of_organization;
    INSERT INTO audit_records (id, organization_id, actor, action, target_kind, target_id, before, after)
    VALUES ((millis || '7' || left(hash, 3) || '8' || substr(hash, 4, 15))::uuid, of_organization, 'system',
            'connection.disabled', 'connection', connection::text, '{"enabled": true}',
            jsonb_build_object('enabled', false, 'disabledReason', why));
    PERFORM announce_connection(of_organization, connection, 'eventbus.connection.disabled', json_strip_nulls(json_build_object(
        'connectionId', connection, 'name', disabled.name, 'reason', why,
        'failingSince', to_char(disabled.failing_since AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS"Z"'))));
    RETURN true;
END
$$;

-- Notes that the endpoint of a connection fails, unless the connection was changed since the attempts that failed, and
-- disables it if that is noted for longer than `after_s` seconds, 0 for never. Answers whether it was disabled.
CREATE FUNCTION note_failing(of_organization uuid, connection uuid, attempted_version bigint, after_s double precision)
    RETURNS boolean
    LANGUAGE plpgsql SECURITY DEFINER SET search_path FROM CURRENT
AS $$
DECLARE
    since timestamptz;
BEGIN
    -- An older publisher that enables a connection leaves the time in place.
    SELECT greatest(failing_since, CASE WHEN failing_since IS NOT NULL THEN updated_at END) INTO since FROM connections
     WHERE id = connection AND organization_id = of_organization AND version = attempted_version;
    IF since IS NULL THEN
        UPDATE connections SET failing_since = now()
         WHERE id = connection AND organization_id = of_organization AND version = attempted_version
           AND failing_since IS NULL AND enabled AND deleted_at IS NULL;
        RETURN false;
    END IF;
    IF after_s <= 0 OR since > now() - make_interval(secs => after_s) THEN
        RETURN false;
    END IF;
    RETURN disable_connection(of_organization, connection, attempted_version,
        'failing since ' || to_char(since AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS"Z"'));
END
$$;
REVOKE ALL ON FUNCTION note_failing(uuid, uuid, bigint, double precision) FROM PUBLIC;

-- Notes that the endpoint of a connection works.
CREATE FUNCTION note_working(of_organization uuid, connection uuid) RETURNS void
    LANGUAGE sql SECURITY DEFINER SET search_path FROM CURRENT
AS $$
    UPDATE connections SET failing_since = NULL
     WHERE id = connection AND organization_id = of_organization AND enabled AND failing_since IS NOT NULL
$$;
REVOKE ALL ON FUNCTION note_working(uuid, uuid) FROM PUBLIC;
