//! An OCI image layout: a folder, or an archive of one, with `oci-layout`, `index.json` and `blobs/sha256/`. Nothing of a blob
//! is used before its digest is known to be right.

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use sha2::{Digest as _, Sha256};
use std::collections::BTreeMap;
use std::fmt::{self, Write as _};
use std::fs::{self, File};
use std::io::{self, BufReader, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

/// The most bytes of an index, a manifest or a configuration.
const MAX_JSON: u64 = 4 << 20;
/// How deep an index may be in another.
const MAX_NESTING: usize = 4;
/// The types of documents, in OCI's words and in Docker's.
const MANIFESTS: [&str; 2] =
    ["application/vnd.oci.image.manifest.v1+json", "application/vnd.docker.distribution.manifest.v2+json"];
const INDEXES: [&str; 2] =
    ["application/vnd.oci.image.index.v1+json", "application/vnd.docker.distribution.manifest.list.v2+json"];
const CONFIGS: [&str; 2] =
    ["application/vnd.oci.image.config.v1+json", "application/vnd.docker.container.image.v1+json"];
/// Where an index says what an image is called.
const NAME: &str = "org.opencontainers.image.ref.name";

/// The SHA-256 of a blob, as 64 digits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Digest(String);

impl Digest {
    /// Reads `sha256:` and 64 hexadecimal digits.
    pub(super) fn parse(text: &str) -> Result<Self> {
        let (algorithm, digits) = text.split_once(':').with_context(|| format!("{text:?} is no digest"))?;
        ensure!(algorithm == "sha256", "{text:?}: no digest but sha256 is supported");
        let hex = |c: char| c.is_ascii_digit() || ('a'..='f').contains(&c);
        ensure!(digits.len() == 64 && digits.chars().all(hex), "{text:?} is no digest");
        Ok(Self(digits.to_owned()))
    }

    /// The 64 digits.
    pub(super) fn digits(&self) -> &str {
        &self.0
    }

    /// The digest of what was read by this.
    pub(super) fn of(hasher: Sha256) -> Self {
        let mut digits = String::new();
        for byte in hasher.finalize() {
            // Writing to a string does not fail.
            let _ = write!(digits, "{byte:02x}");
        }
        Self(digits)
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sha256:{}", self.0)
    }
}

/// A blob, as another document names it.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Descriptor {
    #[serde(default)]
    pub(super) media_type: String,
    digest: String,
    size: u64,
    platform: Option<Platform>,
    #[serde(default)]
    annotations: Option<BTreeMap<String, String>>,
}

#[derive(Clone, Debug, Deserialize)]
struct Platform {
    architecture: String,
    os: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Version {
    image_layout_version: String,
}

#[derive(Deserialize)]
struct Index {
    #[serde(default)]
    manifests: Vec<Descriptor>,
}

/// What an image consists of.
#[derive(Debug, Deserialize)]
pub(super) struct Manifest {
    pub(super) config: Descriptor,
    pub(super) layers: Vec<Descriptor>,
}

/// A layout that is open.
#[derive(Debug)]
pub(super) struct Layout {
    path: PathBuf,
    files: Files,
}

#[derive(Debug)]
enum Files {
    Folder,
    /// Where the files of the archive lie in it: first byte and size.
    Archive(BTreeMap<String, (u64, u64)>),
}

impl Layout {
    /// Opens a folder, or an archive that is not compressed.
    pub(super) fn open(path: &Path) -> Result<Self> {
        let metadata = fs::metadata(path).with_context(|| format!("no image {}", path.display()))?;
        let files = if metadata.is_dir() { Files::Folder } else { archive(path)? };
        let layout = Self { path: path.to_owned(), files };
        let version =
            layout.file("oci-layout", MAX_JSON).with_context(|| match layout.file("manifest.json", MAX_JSON) {
                Ok(_) => format!("{} is in Docker's own format: it has no OCI image layout", path.display()),
                Err(_) => format!("{} is no OCI image layout", path.display()),
            })?;
        let Version { image_layout_version: version } = document(&version).context("oci-layout")?;
        ensure!(version == "1.0.0", "oci-layout: version {version} is not supported");
        Ok(layout)
    }

    /// Finds the image for linux on amd64, by its name if one is given. Returns its manifest, and the digest of that.
    pub(super) fn manifest(&self, name: Option<&str>) -> Result<(Digest, Manifest)> {
        let index: Index = document(&self.file("index.json", MAX_JSON)?).context("index.json")?;
        let named = |image: &&Descriptor| name.is_none_or(|name| image.name() == Some(name));
        let mut found = Vec::new();
        for image in index.manifests.iter().filter(named) {
            self.collect(image, MAX_NESTING, &mut found)?;
        }
        // One image may have several names.
        found.dedup_by(|one, other| one.digest == other.digest);
        let [image] = found.as_slice() else {
            let names: Vec<_> = index.manifests.iter().filter_map(Descriptor::name).collect();
            let names = if names.is_empty() { "no name".to_owned() } else { names.join(", ") };
            match name {
                Some(name) if found.is_empty() => bail!("no image {name} for linux on amd64; there are: {names}"),
                _ if found.is_empty() => bail!("no image for linux on amd64"),
                _ => bail!("{} images for linux on amd64; name one, as PATH:NAME: {names}", found.len()),
            }
        };
        let digest = Digest::parse(&image.digest)?;
        let manifest: Manifest = self.document(image)?;
        let kind = &manifest.config.media_type;
        ensure!(CONFIGS.contains(&kind.as_str()), "{digest}: no container image, but one of {kind}");
        Ok((digest, manifest))
    }

    /// Adds to `found` what may be the image for this machine.
    fn collect(&self, image: &Descriptor, nesting: usize, found: &mut Vec<Descriptor>) -> Result<()> {
        let foreign = |platform: &Platform| platform.os != "linux" || platform.architecture != "amd64";
        if image.platform.as_ref().is_some_and(foreign) {
            return Ok(());
        }
        let kind = image.media_type.as_str();
        if INDEXES.contains(&kind) {
            ensure!(nesting > 0, "{}: an index in an index in an index", image.digest);
            let index: Index = self.document(image)?;
            return index.manifests.iter().try_for_each(|image| self.collect(image, nesting - 1, found));
        }
        ensure!(MANIFESTS.contains(&kind), "{}: no image, but {kind:?}", image.digest);
        found.push(image.clone());
        Ok(())
    }

    /// Reads a blob that is a document.
    pub(super) fn document<T: DeserializeOwned>(&self, blob: &Descriptor) -> Result<T> {
        ensure!(blob.size <= MAX_JSON, "{}: {} bytes, and a document has at most {MAX_JSON}", blob.digest, blob.size);
        let mut bytes = Vec::new();
        self.blob(blob)?.read_to_end(&mut bytes)?;
        document(&bytes).with_context(|| blob.digest.clone())
    }

    /// Opens a blob, once its size and digest are known to be right.
    pub(super) fn blob(&self, blob: &Descriptor) -> Result<impl Read> {
        let digest = Digest::parse(&blob.digest)?;
        let (file, size) = self.reader(&format!("blobs/sha256/{}", digest.digits()))?;
        ensure!(size == blob.size, "{digest} has {size} bytes, and should have {}", blob.size);
        let mut hashing = Hashing::new(BufReader::new(file));
        io::copy(&mut hashing, &mut io::sink()).with_context(|| digest.to_string())?;
        let found = hashing.digest();
        ensure!(found == digest, "damaged: {digest} has the digest {found}");
        Ok(self.reader(&format!("blobs/sha256/{}", digest.digits()))?.0)
    }

    /// Reads a file of the layout as a whole.
    fn file(&self, name: &str, most: u64) -> Result<Vec<u8>> {
        let (file, size) = self.reader(name)?;
        ensure!(size <= most, "{name}: {size} bytes, and at most {most} are sensible");
        let mut bytes = Vec::new();
        file.take(most).read_to_end(&mut bytes)?;
        Ok(bytes)
    }

    /// Opens a file of the layout. Returns its size, too.
    fn reader(&self, name: &str) -> Result<(impl Read + use<>, u64)> {
        let missing = || format!("{} has no {name}", self.path.display());
        match &self.files {
            Files::Folder => {
                let path = self.path.join(name);
                let metadata = fs::metadata(&path).with_context(missing)?;
                ensure!(metadata.is_file(), "{}: no file", path.display());
                let file = File::open(&path).with_context(|| path.display().to_string())?;
                Ok((file.take(metadata.len()), metadata.len()))
            }
            Files::Archive(places) => {
                let (at, size) = *places.get(name).with_context(missing)?;
                let mut file = File::open(&self.path)?;
                file.seek(SeekFrom::Start(at))?;
                Ok((file.take(size), size))
            }
        }
    }
}

impl Descriptor {
    /// What the image is called.
    fn name(&self) -> Option<&str> {
        self.annotations.as_ref()?.get(NAME).map(String::as_str)
    }

    /// For messages: what the blob is called.
    pub(super) fn digest(&self) -> &str {
        &self.digest
    }
}

/// Finds the files in an archive.
fn archive(path: &Path) -> Result<Files> {
    let unusable = || format!("{}: no folder with an image, and no archive of one", path.display());
    let file = File::open(path).with_context(|| path.display().to_string())?;
    let mut archive = tar::Archive::new(BufReader::new(file));
    let mut places = BTreeMap::new();
    for entry in archive.entries().with_context(unusable)? {
        let entry = entry.with_context(unusable)?;
        if entry.header().entry_type().is_file() {
            let name = String::from_utf8_lossy(&entry.path_bytes()).trim_start_matches("./").to_owned();
            places.insert(name, (entry.raw_file_position(), entry.size()));
        }
    }
    Ok(Files::Archive(places))
}

fn document<T: DeserializeOwned>(bytes: &[u8]) -> Result<T> {
    serde_json::from_slice(bytes).context("not what it should be")
}

/// A reader that knows the digest of what was read.
pub(super) struct Hashing<R> {
    inner: R,
    hasher: Sha256,
}

impl<R> Hashing<R> {
    pub(super) fn new(inner: R) -> Self {
        Self { inner, hasher: Sha256::new() }
    }

    pub(super) fn digest(self) -> Digest {
        Digest::of(self.hasher)
    }
}

impl<R: Read> Read for Hashing<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buffer)?;
        self.hasher.update(&buffer[..count]);
        Ok(count)
    }
}
