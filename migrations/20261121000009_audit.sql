-- Audit records: who changed what, and when. Each is written in the transaction of the change that it tells of, so that
-- there is neither without the other. Secrets are never among what it says; see `bus_core::audit`.

CREATE TABLE audit_records (
    -- A UUIDv7.
    id              uuid NOT NULL,
    -- Whose thing was changed; none for what belongs to no organization alone.
    organization_id uuid,
    at              timestamptz NOT NULL DEFAULT now(),
    actor           text NOT NULL CHECK (actor IN ('key', 'admin', 'system')),
    -- The API key, and the connection that it was bound to.
    key_id          uuid,
    connection_id   uuid,
    action          text NOT NULL,
    target_kind     text NOT NULL,
    target_id       text NOT NULL,
    before          jsonb,
    after           jsonb,
    -- The `x-request-id` of the request.
    request_id      text,
    -- When it was passed on to the audit stream.
    relayed_at      timestamptz,
    PRIMARY KEY (id),
    CHECK ((actor = 'key') = (key_id IS NOT NULL)),
    CHECK (actor = 'key' OR connection_id IS NULL)
) PARTITION BY RANGE (id);
CREATE TABLE audit_records_default PARTITION OF audit_records DEFAULT;
CREATE INDEX audit_records_page ON audit_records (organization_id, id);
CREATE INDEX audit_records_target ON audit_records (organization_id, target_kind, target_id, id);
CREATE INDEX audit_records_open ON audit_records (id) WHERE relayed_at IS NULL;

-- The functions below run as the owner; see 20261121000006.
SELECT set_config('search_path', current_setting('search_path') || ', pg_temp', true);

-- As before, with one table more.
CREATE OR REPLACE FUNCTION create_day_partition(parent text, day date) RETURNS boolean
    LANGUAGE plpgsql SECURITY DEFINER SET search_path FROM CURRENT
AS $$
DECLARE
    name text := format('%s_%s', parent, to_char(day, 'YYYYMMDD'));
BEGIN
    IF parent NOT IN ('events', 'delivery_attempts', 'occurrences', 'audit_records') THEN
        RAISE EXCEPTION 'table % is not partitioned by day', parent;
    END IF;
    PERFORM pg_advisory_xact_lock(hashtext(parent));
    IF to_regclass(name) IS NOT NULL THEN
        RETURN false;
    END IF;
    PERFORM set_config('lock_timeout', '2s', true);
    EXECUTE format('CREATE TABLE %I PARTITION OF %I FOR VALUES FROM (%L) TO (%L)',
                   name, parent, uuid_floor(day), uuid_floor(day + 1));
    RETURN true;
END
$$;

SELECT create_day_partition('audit_records', (now() AT TIME ZONE 'UTC')::date + ahead) FROM generate_series(0, 7) AS ahead;

-- As before, with a record of what it has done. The record's id is a UUIDv7 of now; where others have random bits it has
-- those of a hash of connection and version, which nothing else is disabled with.
CREATE OR REPLACE FUNCTION disable_connection(of_organization uuid, connection uuid, attempted_version bigint, why text)
    RETURNS boolean
    LANGUAGE plpgsql SECURITY DEFINER SET search_path FROM CURRENT
AS $$
DECLARE
    millis text := lpad(to_hex(floor(extract(epoch FROM now()) * 1000)::bigint), 12, '0');
    hash   text := encode(sha256(convert_to(connection || ':' || attempted_version, 'UTF8')), 'hex');
BEGIN
    PERFORM 1 FROM organizations WHERE id = of_organization FOR NO KEY UPDATE;
    UPDATE connections
       SET enabled = false, disabled_reason = why, version = version + 1, updated_at = now()
     WHERE id = connection AND organization_id = of_organization AND version = attempted_version
       AND enabled AND deleted_at IS NULL;
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    UPDATE organizations SET version = version + 1 WHERE id = of_organization;
    INSERT INTO audit_records (id, organization_id, actor, action, target_kind, target_id, before, after)
    VALUES ((millis || '7' || left(hash, 3) || '8' || substr(hash, 4, 15))::uuid, of_organization, 'system',
            'connection.disabled', 'connection', connection::text, '{"enabled": true}',
            jsonb_build_object('enabled', false, 'disabledReason', why));
    RETURN true;
END
$$;
