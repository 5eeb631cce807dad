//! Requests: turns bytes into a checked value. Nothing is decided here and nothing changes.

use alloc::vec::Vec;

use crate::domain::{Caller, DomainId, parse_decimal, parse_domain};
use crate::error::StoreError;
use crate::path::{Path, Resolved};
use crate::permission::{Permission, Permissions};
use crate::quota::Quotas;
use crate::watch::TOKEN_MAX;
use crate::wire::{Kind, string_and_rest, strings};

/// A request of a client.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Request<'a> {
    Control(&'a [u8]),
    Directory(Path),
    DirectoryPart(Path, usize),
    Read(Path),
    GetPermissions(Path),
    Write(Path, &'a [u8]),
    MakeDirectory(Path),
    Remove(Path),
    SetPermissions(Path, Permissions),
    Watch(WatchRequest<'a>),
    Unwatch(WatchRequest<'a>),
    ResetWatches,
    TransactionStart,
    TransactionEnd { commit: bool },
    Introduce { domain: DomainId, frame: u64, port: u32 },
    Release(DomainId),
    Resume(DomainId),
    SetTarget(DomainId, DomainId),
    IsDomainIntroduced(DomainId),
    GetDomainPath(DomainId),
    GetFeature,
}

/// A watch as a client describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct WatchRequest<'a> {
    pub(crate) place: Resolved,
    pub(crate) token: &'a [u8],
    pub(crate) depth: Option<u32>,
}

impl<'a> Request<'a> {
    /// Decodes the payload of a message of this kind.
    pub(crate) fn decode(kind: u32, payload: &'a [u8], caller: &Caller, quotas: &Quotas) -> Result<Self, StoreError> {
        let kind = Kind::from_number(kind).ok_or(StoreError::NotSupported)?;
        if is_for_privileged(kind) && !caller.privileged {
            return Err(StoreError::Access);
        }
        let reader = Reader { caller, quotas };
        Ok(match kind {
            Kind::Control => Self::Control(string_and_rest(payload)?.0),
            Kind::Directory => Self::Directory(reader.only_path(payload)?),
            Kind::DirectoryPart => {
                let [path, offset] = strings(payload)?;
                let offset = usize::try_from(parse_decimal(offset)?).unwrap_or(usize::MAX);
                Self::DirectoryPart(reader.path(path)?, offset)
            }
            Kind::Read => Self::Read(reader.only_path(payload)?),
            Kind::GetPermissions => {
                let [path] = strings(payload)?;
                Self::GetPermissions(reader.path_or_special(path)?.path)
            }
            Kind::Write => {
                let (path, value) = string_and_rest(payload)?;
                Self::Write(reader.path(path)?, value)
            }
            Kind::MakeDirectory => Self::MakeDirectory(reader.only_path(payload)?),
            Kind::Remove => Self::Remove(reader.only_path(payload)?),
            Kind::SetPermissions => {
                let (path, list) = string_and_rest(payload)?;
                let path = reader.path_or_special(path)?.path;
                Self::SetPermissions(path, permission_list(list)?)
            }
            Kind::Watch => Self::Watch(reader.watch(payload)?),
            Kind::Unwatch => Self::Unwatch(reader.watch(payload)?),
            Kind::ResetWatches => Self::ResetWatches,
            Kind::TransactionStart => Self::TransactionStart,
            Kind::TransactionEnd => match payload {
                b"T\0" => Self::TransactionEnd { commit: true },
                b"F\0" => Self::TransactionEnd { commit: false },
                _ => return Err(StoreError::Invalid),
            },
            Kind::Introduce => {
                let [domain, frame, port] = strings(payload)?;
                let port = parse_decimal(port)?.try_into().map_err(|_| StoreError::Invalid)?;
                let frame = parse_decimal(frame)?;
                Self::Introduce { domain: parse_domain(domain)?, frame, port }
            }
            Kind::Release => Self::Release(only_domain(payload)?),
            Kind::Resume => Self::Resume(only_domain(payload)?),
            Kind::SetTarget => {
                let [domain, target] = strings(payload)?;
                Self::SetTarget(parse_domain(domain)?, parse_domain(target)?)
            }
            Kind::IsDomainIntroduced => Self::IsDomainIntroduced(only_domain(payload)?),
            Kind::GetDomainPath => Self::GetDomainPath(only_domain(payload)?),
            Kind::GetFeature => Self::GetFeature,
            Kind::WatchEvent | Kind::Error => return Err(StoreError::NotSupported),
        })
    }
}

const fn is_for_privileged(kind: Kind) -> bool {
    matches!(
        kind,
        Kind::Control | Kind::Introduce | Kind::Release | Kind::Resume | Kind::SetTarget | Kind::IsDomainIntroduced
    )
}

fn only_domain(payload: &[u8]) -> Result<DomainId, StoreError> {
    let [domain] = strings(payload)?;
    parse_domain(domain)
}

fn permission_list(list: &[u8]) -> Result<Permissions, StoreError> {
    let body = list.strip_suffix(b"\0").ok_or(StoreError::Invalid)?;
    let entries: Result<Vec<_>, _> = body.split(|byte| *byte == 0).map(Permission::parse).collect();
    Permissions::new(&entries?)
}

/// Decodes the parts of a payload whose meaning depends on the caller.
pub(crate) struct Reader<'a> {
    pub(crate) caller: &'a Caller,
    pub(crate) quotas: &'a Quotas,
}

impl Reader<'_> {
    fn only_path(&self, payload: &[u8]) -> Result<Path, StoreError> {
        let [path] = strings(payload)?;
        self.path(path)
    }

    pub(crate) fn path(&self, text: &[u8]) -> Result<Path, StoreError> {
        let resolved = Path::resolve(text, self.caller.domain)?;
        self.within_quota(resolved).map(|resolved| resolved.path)
    }

    pub(crate) fn path_or_special(&self, text: &[u8]) -> Result<Resolved, StoreError> {
        let resolved = Path::resolve_special(text, self.caller.domain)?;
        self.within_quota(resolved)
    }

    fn within_quota(&self, resolved: Resolved) -> Result<Resolved, StoreError> {
        let long = resolved.path.quota_length() > self.quotas.path_bytes;
        if long && !self.caller.privileged { Err(StoreError::Invalid) } else { Ok(resolved) }
    }

    fn watch<'p>(&self, payload: &'p [u8]) -> Result<WatchRequest<'p>, StoreError> {
        let (path, token, depth) = match strings::<3>(payload) {
            Ok([path, token, depth]) => (path, token, Some(depth)),
            Err(_) => {
                let [path, token] = strings(payload)?;
                (path, token, None)
            }
        };
        let depth = depth.map(parse_decimal).transpose()?;
        let depth = depth.map(u32::try_from).transpose().map_err(|_| StoreError::Invalid)?;
        self.describe_watch(path, token, depth)
    }

    pub(crate) fn describe_watch<'t>(
        &self,
        path: &[u8],
        token: &'t [u8],
        depth: Option<u32>,
    ) -> Result<WatchRequest<'t>, StoreError> {
        // The longest event must fit into a message.
        if token.len() > TOKEN_MAX {
            return Err(StoreError::TooBig);
        }
        Ok(WatchRequest { place: self.path_or_special(path)?, token, depth })
    }
}
