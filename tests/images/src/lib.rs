//! Container images of a few files, for tests: layers that a test describes, and an OCI image layout of them.

#![forbid(unsafe_code)]
#![allow(clippy::missing_panics_doc, reason = "a test that cannot write its files fails")]

use flate2::Compression;
use flate2::write::GzEncoder;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use std::fs;
use std::io::Write;
use std::path::Path;
use tar::{Builder, EntryType, Header};

/// A layer that is being made: a tar file.
pub struct Layer(Builder<Vec<u8>>);

impl Default for Layer {
    fn default() -> Self {
        Self(Builder::new(Vec::new()))
    }
}

impl Layer {
    /// Adds an entry of any kind. A name is not examined, so that it may be a bad one, but has less than 100 bytes.
    #[must_use]
    pub fn entry(mut self, kind: EntryType, name: &str, mode: u32, owner: u32, content: &[u8], target: &str) -> Self {
        let mut header = Header::new_gnu();
        header.set_entry_type(kind);
        header.as_gnu_mut().expect("a header of GNU's").name[..name.len()].copy_from_slice(name.as_bytes());
        header.set_link_name_literal(target).expect("a short target");
        header.set_mode(mode);
        header.set_uid(owner.into());
        header.set_gid(owner.into());
        header.set_mtime(1_000_000_000);
        header.set_size(content.len() as u64);
        if kind.is_character_special() || kind.is_block_special() {
            header.set_device_major(1).expect("a header with devices");
            header.set_device_minor(3).expect("a header with devices");
        }
        header.set_cksum();
        self.0.append(&header, content).expect("memory");
        self
    }

    /// Adds a file of root's.
    #[must_use]
    pub fn file(self, name: &str, content: impl AsRef<[u8]>) -> Self {
        self.entry(EntryType::Regular, name, 0o644, 0, content.as_ref(), "")
    }

    /// Adds a program.
    #[must_use]
    pub fn program(self, name: &str, content: impl AsRef<[u8]>) -> Self {
        self.entry(EntryType::Regular, name, 0o755, 0, content.as_ref(), "")
    }

    /// Adds a folder that belongs to the user and the group with the number `owner`.
    #[must_use]
    pub fn folder(self, name: &str, mode: u32, owner: u32) -> Self {
        self.entry(EntryType::Directory, name, mode, owner, &[], "")
    }

    /// Adds a symbolic link.
    #[must_use]
    pub fn link(self, name: &str, target: &str) -> Self {
        self.entry(EntryType::Symlink, name, 0o777, 0, &[], target)
    }

    /// Adds a hard link.
    #[must_use]
    pub fn hard_link(self, name: &str, target: &str) -> Self {
        self.entry(EntryType::Link, name, 0o644, 0, &[], target)
    }

    /// Gives the next entry extended attributes.
    #[must_use]
    pub fn attributes(mut self, attributes: &[(&str, &[u8])]) -> Self {
        let names: Vec<_> = attributes.iter().map(|(name, value)| (format!("SCHILY.xattr.{name}"), *value)).collect();
        self.0.append_pax_extensions(names.iter().map(|(name, value)| (name.as_str(), *value))).expect("memory");
        self
    }

    /// The tar file.
    #[must_use]
    pub fn bytes(self) -> Vec<u8> {
        self.0.into_inner().expect("memory")
    }
}

/// A layer as a blob.
#[derive(Clone, Debug)]
pub struct Packed {
    /// Its type.
    pub kind: &'static str,
    /// Its bytes.
    pub bytes: Vec<u8>,
    /// The digest of its tar file.
    pub digest: String,
}

impl Packed {
    /// A tar file as it is.
    #[must_use]
    pub fn plain(tar: Vec<u8>) -> Self {
        Self { kind: "application/vnd.oci.image.layer.v1.tar", digest: digest(&tar), bytes: tar }
    }

    /// A tar file, packed by gzip.
    #[must_use]
    pub fn gzip(tar: &[u8]) -> Self {
        let mut packer = GzEncoder::new(Vec::new(), Compression::fast());
        packer.write_all(tar).expect("memory");
        let bytes = packer.finish().expect("memory");
        Self { kind: "application/vnd.oci.image.layer.v1.tar+gzip", digest: digest(tar), bytes }
    }
}

/// The digest of bytes, as documents name it.
#[must_use]
pub fn digest(bytes: &[u8]) -> String {
    let digits: String = Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect();
    format!("sha256:{digits}")
}

/// Writes a blob of a layout. Returns how a document names it.
pub fn blob(folder: &Path, kind: &str, bytes: &[u8]) -> Value {
    let blobs = folder.join("blobs/sha256");
    fs::create_dir_all(&blobs).expect("a folder for blobs");
    let digest = digest(bytes);
    fs::write(blobs.join(digest.trim_start_matches("sha256:")), bytes).expect("a blob");
    json!({ "mediaType": kind, "digest": digest, "size": bytes.len() })
}

/// Writes a layout with these manifests, named as documents name them.
pub fn layout(folder: &Path, manifests: &[Value]) {
    fs::write(folder.join("oci-layout"), json!({ "imageLayoutVersion": "1.0.0" }).to_string()).expect("oci-layout");
    let index = json!({ "schemaVersion": 2, "manifests": manifests });
    fs::write(folder.join("index.json"), index.to_string()).expect("index.json");
}

/// Writes an image into a layout. `config` is what it says of its process. Returns how a document names its manifest.
pub fn image(folder: &Path, layers: &[Packed], config: &Value) -> Value {
    let digests: Vec<_> = layers.iter().map(|layer| &layer.digest).collect();
    let rootfs = json!({ "type": "layers", "diff_ids": digests });
    let config = json!({ "architecture": "amd64", "os": "linux", "config": config, "rootfs": rootfs });
    let config = blob(folder, "application/vnd.oci.image.config.v1+json", config.to_string().as_bytes());
    let layers: Vec<_> = layers.iter().map(|layer| blob(folder, layer.kind, &layer.bytes)).collect();
    let manifest = json!({ "schemaVersion": 2, "config": config, "layers": layers }).to_string();
    blob(folder, "application/vnd.oci.image.manifest.v1+json", manifest.as_bytes())
}

/// Writes a layout with one image. Its process is as `config` says.
pub fn write(folder: &Path, layers: &[Packed], config: &Value) {
    let manifest = image(folder, layers, config);
    layout(folder, &[manifest]);
}
