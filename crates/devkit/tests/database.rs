//! The migrations and the roles, and a database for each test.

#![allow(clippy::unwrap_used, clippy::missing_docs_in_private_items)]

use devkit::{
    database::{Database, MigrationState, apply_roles, migrate, migration_status, role_url},
    processes::Role,
    servers::shared_servers,
};
use sqlx::{Connection, PgConnection};

#[tokio::test]
async fn databases_are_migrated_apart_and_open_to_every_role() {
    let servers = shared_servers().await.unwrap();
    let (first, second) =
        tokio::try_join!(Database::create(servers.postgres_url()), Database::create(servers.postgres_url()))
            .unwrap();
    assert_ne!(first.url(), second.url());
    for role in Role::ALL {
        let mut connection = PgConnection::connect(&role_url(first.url(), role).unwrap()).await.unwrap();
        let (user, superuser): (String, bool) =
            sqlx::query_as("SELECT rolname::text, rolsuper FROM pg_roles WHERE rolname = current_user")
                .fetch_one(&mut connection)
                .await
                .unwrap();
        assert_eq!((user.as_str(), superuser), (role.postgres_role(), false));
        let created = sqlx::query("CREATE TABLE mine (x int)").execute(&mut connection).await;
        assert!(created.is_err(), "{user} may create tables");
    }
    first.drop().await.unwrap();
    second.drop().await.unwrap();
}

#[tokio::test]
async fn migrating_and_granting_again_changes_nothing() {
    let servers = shared_servers().await.unwrap();
    let database = Database::create(servers.postgres_url()).await.unwrap();
    migrate(database.url()).await.unwrap();
    apply_roles(database.url()).await.unwrap();
    let list = migration_status(database.url()).await.unwrap();
    assert!(!list.is_empty());
    assert!(list.iter().all(|migration| migration.state == MigrationState::Applied), "{list:?}");

    let mut owner = PgConnection::connect(database.url()).await.unwrap();
    sqlx::query("UPDATE _sqlx_migrations SET checksum = '\\x00'::bytea WHERE version = $1")
        .bind(list[0].version)
        .execute(&mut owner)
        .await
        .unwrap();
    let list = migration_status(database.url()).await.unwrap();
    assert_eq!(list[0].state, MigrationState::Changed);
    owner.close().await.unwrap();
    database.drop().await.unwrap();
}
