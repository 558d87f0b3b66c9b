//! Who asks, and what they may do. Organization, identity and rights come from the credential and from
//! nothing else (invariant I3).

use std::{fmt, marker::PhantomData, time::Duration};

use axum::extract::FromRequestParts;
use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use bus_core::{
    audit::{Actor, By},
    ids::{AuditId, ConnectionId, KeyId, OrganizationId},
    pg::{self, Credential, Publisher, Scope, Scopes, Whose},
};
use http::{Extensions, HeaderMap, header::AUTHORIZATION, request::Parts};
use moka::future::Cache;
use rand::RngCore as _;
use sha2::{Digest as _, Sha256};
use subtle::ConstantTimeEq as _;

use super::{
    Api,
    finish::RequestId,
    problem::{Problem, ProblemType},
};

/// What every key starts with, so that secret scanners and people recognise one.
const KEY_PREFIX: &str = "ebk_";

/// How many bytes of a key are random.
const KEY_BYTES: usize = 32;

/// The longest credential that is looked at, bytes.
const MAX_CREDENTIAL: usize = 512;

/// How long a key that was found may be used to publish without looking again. The publish transaction
/// itself refuses a revoked key; what may be late is only the end of reading requests with it.
const CACHE_TTL: Duration = Duration::from_secs(60);

/// The most keys that are kept.
const CACHE_CAPACITY: u64 = 10_000;

/// SHA-256 of a credential.
pub(super) type CredentialHash = [u8; 32];

/// Whom a request acts for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Principal {
    /// The key.
    pub key: KeyId,
    /// Whose it is.
    pub organization: OrganizationId,
    /// The identity that it publishes under.
    pub connection: Option<ConnectionId>,
    /// What it may do.
    pub scopes: Scopes,
}

impl Principal {
    /// The one connection that this principal may see and change, with its subscriptions; none if it may
    /// see all. An `admin` key could make itself an unbound one, so a bound one is not restricted.
    pub fn restricted_to(&self) -> Option<ConnectionId> {
        self.connection.filter(|_| !self.scopes.contains(Scope::Admin))
    }

    /// Who this is in audit records.
    pub(super) fn actor(&self) -> Actor {
        Actor::Key { key_id: self.key, connection_id: self.connection }
    }

    /// Whose deliveries this principal may see and change.
    pub fn whose(&self) -> Whose {
        Whose { organization: self.organization, only: self.restricted_to() }
    }

    /// Whose schedules this principal may see and change.
    pub fn publisher(&self) -> Publisher {
        Publisher { organization: self.organization, only: self.restricted_to() }
    }

    /// Whether this principal may see that connection, if its organization has it.
    pub fn sees(&self, connection: ConnectionId) -> bool {
        self.restricted_to().is_none_or(|own| own == connection)
    }
}

impl From<Credential> for Principal {
    fn from(credential: Credential) -> Self {
        Self {
            key: credential.key,
            organization: credential.organization,
            connection: credential.connection,
            scopes: credential.scopes,
        }
    }
}

/// A new key. It is shown once; the database gets the hash.
pub(super) struct FreshKey {
    pub(super) text: String,
    pub(super) hash: CredentialHash,
}

impl FreshKey {
    pub(super) fn generate() -> Self {
        let mut random = [0; KEY_BYTES];
        rand::rng().fill_bytes(&mut random);
        let text = format!("{KEY_PREFIX}{}", URL_SAFE_NO_PAD.encode(random));
        let hash = hash(&text);
        Self { text, hash }
    }
}

fn hash(credential: &str) -> CredentialHash {
    Sha256::digest(credential.as_bytes()).into()
}

/// Keys that were found lately, for publishing only.
#[derive(Clone)]
pub(super) struct KeyCache(Cache<CredentialHash, Principal>);

impl KeyCache {
    pub(super) fn new() -> Self {
        Self(Cache::builder().max_capacity(CACHE_CAPACITY).time_to_live(CACHE_TTL).build())
    }

    async fn find(&self, api: &Api, hash: CredentialHash) -> Result<Principal, Problem> {
        // Concurrent requests with one key share one look-up.
        self.0.try_get_with(hash, look_up(api, hash)).await.map_err(|problem| Problem::clone(&problem))
    }

    pub(super) async fn forget(&self, hash: &CredentialHash) {
        self.0.invalidate(hash).await;
    }
}

impl fmt::Debug for KeyCache {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KeyCache").field("entries", &self.0.entry_count()).finish()
    }
}

fn unauthorized(detail: &'static str) -> Problem {
    Problem::new(ProblemType::Unauthorized, detail)
}

/// The credential of a request (RFC 6750 §2.1).
fn presented(headers: &HeaderMap) -> Result<CredentialHash, Problem> {
    let mut values = headers.get_all(AUTHORIZATION).iter();
    let (Some(value), None) = (values.next(), values.next()) else {
        return Err(unauthorized("send one header `Authorization: Bearer <key>`"));
    };
    let credential = value
        .to_str()
        .ok()
        .and_then(|value| value.split_once(' '))
        .filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer"))
        .map(|(_, credential)| credential.trim())
        .filter(|credential| !credential.is_empty() && credential.len() <= MAX_CREDENTIAL)
        .ok_or_else(|| unauthorized("the Authorization header must be `Bearer <key>`"))?;
    Ok(hash(credential))
}

async fn look_up(api: &Api, hash: CredentialHash) -> Result<Principal, Problem> {
    match pg::authenticate(&api.pool, &hash).await? {
        Some(credential) => Ok(credential.into()),
        // The administrator is somebody, but belongs to no organization.
        None if is_admin_token(api, &hash) => Err(Problem::new(
            ProblemType::Forbidden,
            "the admin token works for /v1/admin only; create an API key there",
        )),
        None => Err(unauthorized("the key is unknown, was revoked or has expired")),
    }
}

/// Compares hashes, and in constant time: neither the token nor a prefix of it can be guessed by timing.
fn is_admin_token(api: &Api, hash: &CredentialHash) -> bool {
    api.admin_token.as_ref().is_some_and(|token| token.ct_eq(hash).into())
}

/// What an operation asks of a key.
pub(super) trait Requirement: Send + Sync {
    /// Any of these will do.
    const ANY_OF: &'static [Scope];
}

macro_rules! requirements {
    ($($(#[$doc:meta])* $name:ident = $($scope:ident)|+;)*) => {
        $(
            $(#[$doc])*
            #[derive(Debug, Clone, Copy)]
            pub(super) struct $name;
            impl Requirement for $name {
                const ANY_OF: &'static [Scope] = &[$(Scope::$scope),+];
            }
        )*
    };
}

requirements! {
    /// Connections and subscriptions, to change them.
    Manage = Subscribe;
    /// Connections and subscriptions, to read them.
    Look = Subscribe | Read;
    /// Events, to take them back.
    TakeBack = Publish;
    /// History.
    History = Read;
    /// What is published later, to change it.
    PublishLater = Publish;
    /// Audit records.
    Audit = Admin;
    /// Payloads, to erase them.
    Erase = Admin;
}

/// A principal who may do what `R` asks for; looked up in the database, so that a revoked key ends at
/// once.
#[derive(Debug, Clone, Copy)]
pub(super) struct Authorized<R>(pub(super) Principal, pub(super) PhantomData<R>);

impl<R: Requirement> FromRequestParts<Api> for Authorized<R> {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, api: &Api) -> Result<Self, Problem> {
        let principal = look_up(api, presented(&parts.headers)?).await?;
        require(principal, R::ANY_OF)?;
        Ok(Self(principal, PhantomData))
    }
}

/// A principal who may publish; may come from the cache, because the publish transaction looks again.
#[derive(Debug, Clone, Copy)]
pub(super) struct PublishAccess {
    pub(super) principal: Principal,
    pub(super) credential: CredentialHash,
}

impl PublishAccess {
    /// The principal as of now: for what is not stored by a publish transaction.
    pub(super) async fn confirmed(self, api: &Api) -> Result<Principal, Problem> {
        let principal = look_up(api, self.credential).await?;
        require(principal, &[Scope::Publish])?;
        Ok(principal)
    }
}

impl FromRequestParts<Api> for PublishAccess {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, api: &Api) -> Result<Self, Problem> {
        let credential = presented(&parts.headers)?;
        let principal = api.key_cache.find(api, credential).await?;
        require(principal, &[Scope::Publish])?;
        Ok(Self { principal, credential })
    }
}

fn require(principal: Principal, any_of: &[Scope]) -> Result<(), Problem> {
    if any_of.iter().any(|scope| principal.scopes.allows(*scope)) {
        return Ok(());
    }
    let names: Vec<_> = any_of.iter().map(|scope| format!("`{}`", scope.as_str())).collect();
    let detail = format!("this needs a key with the scope {}", names.join(" or "));
    Err(Problem::new(ProblemType::Forbidden, detail))
}

/// Who administers.
#[derive(Debug, Clone, Copy)]
pub(super) enum AdminAccess {
    /// The bearer of the admin token: all organizations.
    Everything,
    /// A key with the scope `admin`: its own organization.
    Own(Principal),
}

impl AdminAccess {
    /// Refuses all but the admin token.
    pub(super) fn everything(self) -> Result<(), Problem> {
        match self {
            Self::Everything => Ok(()),
            Self::Own(_) => Err(Problem::new(ProblemType::Forbidden, "this needs the admin token")),
        }
    }

    /// Refuses whoever may not know of that organization.
    pub(super) fn organization(self, id: OrganizationId) -> Result<(), Problem> {
        match self {
            Self::Own(principal) if principal.organization != id => Err(Problem::not_found()),
            _ => Ok(()),
        }
    }
}

impl FromRequestParts<Api> for AdminAccess {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, api: &Api) -> Result<Self, Problem> {
        let hash = presented(&parts.headers)?;
        if is_admin_token(api, &hash) {
            return Ok(Self::Everything);
        }
        let principal = look_up(api, hash).await?;
        require(principal, &[Scope::Admin])?;
        Ok(Self::Own(principal))
    }
}

/// What a request brings that is about to do something that leaves an audit record.
pub(super) fn by(api: &Api, actor: Actor, extensions: &Extensions) -> By {
    let request = extensions.get::<RequestId>().map(|RequestId(id)| id.clone());
    By { record: AuditId(api.ids.next()), actor, request }
}

/// A credential that says who acts.
pub(super) trait Acts {
    /// Who this is in audit records.
    fn actor(&self) -> Actor;
}

impl<R> Acts for Authorized<R> {
    fn actor(&self) -> Actor {
        self.0.actor()
    }
}

impl Acts for AdminAccess {
    fn actor(&self) -> Actor {
        match self {
            Self::Everything => Actor::Admin,
            Self::Own(principal) => principal.actor(),
        }
    }
}

/// The credential of a request that leaves an audit record, and what the record says of who makes it.
#[derive(Debug)]
pub(super) struct Recorded<A>(pub(super) A, pub(super) By);

impl<A> FromRequestParts<Api> for Recorded<A>
where
    A: Acts + FromRequestParts<Api, Rejection = Problem>,
{
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, api: &Api) -> Result<Self, Problem> {
        let access = A::from_request_parts(parts, api).await?;
        let by = by(api, access.actor(), &parts.extensions);
        Ok(Self(access, by))
    }
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    fn headers(values: &[&'static str]) -> HeaderMap {
        values.iter().map(|value| (AUTHORIZATION, HeaderValue::from_static(value))).collect()
    }

    #[test]
    fn the_credential_is_one_bearer_token() {
        let wanted = hash("ebk_x");
        for good in ["Bearer ebk_x", "bearer ebk_x", "BEARER  ebk_x "] {
            assert_eq!(presented(&headers(&[good])).expect(good), wanted);
        }
        for bad in
            [&[][..], &["ebk_x"], &["Basic ebk_x"], &["Bearer "], &["Bearer"], &["Bearer a", "Bearer a"]]
        {
            let problem = presented(&headers(bad)).expect_err("not a bearer token");
            assert_eq!(problem.kind, ProblemType::Unauthorized, "{bad:?}");
        }
    }

    #[test]
    fn keys_are_long_random_and_marked() {
        let (one, other) = (FreshKey::generate(), FreshKey::generate());
        assert!(one.text.starts_with(KEY_PREFIX));
        assert_eq!(one.text.len(), KEY_PREFIX.len() + 43, "32 bytes are 43 characters of Base64");
        assert_ne!(one.text, other.text);
        assert_eq!(one.hash, hash(&one.text));
    }
}
